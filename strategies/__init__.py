"""How to split a model: decides a Plan, and applies it. Knows nothing of requests."""
