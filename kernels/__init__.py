"""Triton kernels that resolve handles on the device, and their torch references.

Imports torch and triton only. One kernel a module; ``reference`` holds the same functions in clear
torch code, with which every kernel is compared.
"""
