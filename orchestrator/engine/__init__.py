"""What runs on one device: model, weights, attention, KV cache, sampler. Everything here is torch."""
