"""Triton kernels of the CUDA engine. Triton comes with torch, needs no nvcc, and also runs them on a CPU (TRITON_INTERPRET=1)."""
