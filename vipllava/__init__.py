"""ViP-LLaVA on Lightning: multimodal LLMs that understand visual prompts.

The package imports nothing heavy at its root, so that ``vipllava --help`` stays fast.
"""

__version__ = "0.1.0"
