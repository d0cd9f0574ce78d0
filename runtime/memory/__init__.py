"""Memory of a model: estimate, limits of the process, and plans that fit."""
