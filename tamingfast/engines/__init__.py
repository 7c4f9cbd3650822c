"""What runs a network without Python between its layers: the CPU engine, the CUDA engine, bands of rows."""
