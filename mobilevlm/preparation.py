"""Images as the arrays that an encoder takes, and the pieces that stand for them in a prompt."""

from __future__ import annotations

from mobilevlm.image import ImageInput, RoomFor, read_pixels
from mobilevlm.prompt import Piece, Prepared, Run
from mobilevlm.spec import InputSpec


def prepare(source: ImageInput, spec: InputSpec, room_for: RoomFor | None = None) -> Prepared:
    """Return an image as a model takes it; what is prepared already as it is.

    ``room_for``: memory that this may take, as of :func:`mobilevlm.image.read_pixels`.

    Raises:
        ImageError: it is missing, damaged, not an image, or too large.
    """
    if isinstance(source, Prepared):
        return source
    pixels = read_pixels(source, spec.preparation, room_for)
    return Prepared("image", ({"pixels": pixels},), pieces_of(source, spec))


def pieces_of(source: ImageInput | None, spec: InputSpec) -> tuple[Piece, ...]:
    """Return the pieces of an image, which is not read where all images have the same."""
    del source
    return (Run(spec.connector.num_tokens), *spec.layout.end_ids)
