"""A field guide of drawn birds: a fine-grained data set that needs no download and knows its deciding parts.

The species differ in the head alone: the colour of the hood, the ring around the eye, the shape of the beak. Pose,
size, place, plumage, wing bars, perch, background, light and noise vary alike for all of them.
"""

from mge.data.field_guide.dataset import SPLITS, VERSION, FieldGuide, draw_image, write_field_guide
from mge.data.field_guide.draw import Plate, draw_plate
from mge.data.field_guide.sheet import draw_sheet
from mge.data.field_guide.species import MAX_SPECIES, MIN_SPECIES, Species, list_species

__all__ = [
    "MAX_SPECIES",
    "MIN_SPECIES",
    "SPLITS",
    "VERSION",
    "FieldGuide",
    "Plate",
    "Species",
    "draw_image",
    "draw_plate",
    "draw_sheet",
    "list_species",
    "write_field_guide",
]
