"""The six jobs of the cascade, one file each, started as DeepSpeed launch jobs."""

# The checkout root on sys.path would make this folder importable under a second name, as a second module object.
if __name__ != "cogview2.stages":
    raise ModuleNotFoundError(f"import this package as 'cogview2.stages', not as '{__name__}'")
