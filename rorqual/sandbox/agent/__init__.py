"""The guest agent: C sources of one small static program, and the build of it at first use (`build.py`)."""
