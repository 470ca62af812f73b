"""A world of plain shapes that two cores can learn: captions, scenes, a renderer and an exact judge."""
