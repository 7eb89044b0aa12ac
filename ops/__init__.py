"""Tensors in, tensors out: operators that know nothing of CogView2."""

# The checkout root on sys.path would make this folder importable under a second name, as a second module object.
if __name__ != "cogview2.ops":
    raise ModuleNotFoundError(f"import this package as 'cogview2.ops', not as '{__name__}'")
