"""What we have: devices, links between them, actors that own them. Knows nothing of models."""
