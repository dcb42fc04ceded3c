"""The two learned stages as pure PyTorch, and what every layer needs: options, configuration and errors.

Nothing here imports Ray, touches object storage or starts a process. `options`, `config` and `errors` import neither torch
nor ray, so a configuration can be checked on a machine that has neither.
"""

__version__ = "0.1.0"
