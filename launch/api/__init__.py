"""The HTTP side: OpenAI's API over the coordinator."""
