"""The Triton kernels of tamingfast; importing this package imports nothing, each kernel file imports Triton itself."""
