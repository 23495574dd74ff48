"""x"""
from dfa_kernels.backends.triton import launch
from dfa_kernels.backends.triton.launch import project
