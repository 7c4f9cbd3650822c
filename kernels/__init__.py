"""The Triton kernels of tamingfast. Importing the package imports nothing; each kernel file imports Triton."""
