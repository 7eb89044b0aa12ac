"""`cogview2 plan`: memory, time, disk and topology of a recipe before anything starts; nothing here imports torch."""
