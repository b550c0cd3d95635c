"""OpenAI's Responses API over the same turns as chat completions; nothing is stored between requests."""
