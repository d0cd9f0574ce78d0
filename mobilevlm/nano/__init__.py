"""The built-in models: a scene generator, its question suite, training and saving."""
