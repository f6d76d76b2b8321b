"""Memory that states can be paged out of: files on the CPU, unified memory on CUDA."""
