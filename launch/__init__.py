"""How it starts: the only room that reads argv, the environment, YAML and ports."""
