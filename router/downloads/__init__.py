"""Models from hubs to this machine: listed, checked, resumable, once. Knows no model and no device.

Why not huggingface_hub (2.4): it writes to a file of a random name and removes it on failure, so
that nothing can be taken up after a kill; it checks sizes, not hashes; and its errors are those of
another HTTP client in each major version. What is needed of both hubs is one listing and one GET.
The caches keep their tools' layout, so that both sides use what the other one brought.
"""
