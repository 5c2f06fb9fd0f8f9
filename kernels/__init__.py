"""Triton kernels: NAME.py holds @triton.jit kernels and their <op>_fwd / <op>_bwd launchers.

No autograd, no module and no policy here. Installed as pyllm.kernels.
"""

# Without a __version__: PyPI has a package named kernels, and transformers takes a versioned one for that.
