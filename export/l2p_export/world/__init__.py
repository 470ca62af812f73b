"""The small world of plain shapes, which two cores can learn: captions, scenes, a renderer and an exact judge."""
