"""Triton kernels of the CUDA engine. Triton comes with torch, needs no nvcc, and interprets them on a CPU as well."""
