"""The library: config, data, tokenizers, models, training, sampling, metrics.

Imports nothing here, so that pipeline.config stays torch-free.
"""

# The checkout root on sys.path would make this folder importable under a second name, as a second module object.
if __name__ != "cogview2.pipeline":
    raise ModuleNotFoundError(f"import this package as 'cogview2.pipeline', not as '{__name__}'")
