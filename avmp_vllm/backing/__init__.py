"""Where the bytes of an arena live.

================= ==============================================================================
memory            virtual memory: reserve, create, map, allow, unmap, release, free; typed errors
posix, libc       that of the host: anonymous memory, a memory file
cuda_memory       that of a CUDA device, by its driver
elastic_buffer    a range of which two ends have memory: budget, mapping, retirement behind fences
elastic_pages     move plans over it: memory before, and back after
tensor            a torch tensor over addresses
state_codec       states in half their bytes
torch_buffer      pages in a torch tensor, moved by torch or NumPy
kernel_buffer     the same moved by Triton kernels
page_table        a worker's copy of the page table
device_page_table that table on a device
================= ==============================================================================
"""
