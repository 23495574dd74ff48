"""Callbacks for the trainers of other libraries: keep the state of a `DFA`, log its alignment.

- `transformers.DFACallback` for Hugging Face's `Trainer`, with `dfa-kernels[transformers]`
- `lightning.DFACallback` for Lightning, with `dfa-kernels[lightning]`

Each is imported by itself, as it needs a library that dfa_kernels does not.
"""
