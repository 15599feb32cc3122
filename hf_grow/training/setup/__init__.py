"""From a recipe to a trainer that is ready: checks, model, teachers, texts."""
