"""A referee on trial: the answers of an endpoint before and after it, on a person's own questions."""
