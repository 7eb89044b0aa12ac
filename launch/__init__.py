"""What an operator types. Starts processes; never imports torch."""

# The checkout root on sys.path would make this folder importable under a second name, as a second module object.
if __name__ != "cogview2.launch":
    raise ModuleNotFoundError(f"import this package as 'cogview2.launch', not as '{__name__}'")
