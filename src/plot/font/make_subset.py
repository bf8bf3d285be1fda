"""Makes dejavu-sans-subset.ttf from DejaVu Sans: python make_subset.py /usr/share/fonts/truetype/dejavu/DejaVuSans.ttf

Needs fonttools (4.68 was used). Keeps printable ASCII and a few signs, without hinting or layout tables. Every glyph
also gets a contour without area at x = 0: plotters' ab_glyph text renderer places a glyph by the left edge of its
bounding box and so swallows its left side bearing; with that contour the edge is the pen position.
"""

import sys
from pathlib import Path

from fontTools import subset
from fontTools.pens.recordingPen import DecomposingRecordingPen
from fontTools.pens.ttGlyphPen import TTGlyphPen
from fontTools.ttLib import TTFont

CHARACTERS = [*range(0x20, 0x7F), *map(ord, "·×–—…→≥≤")]
NAME = "DejaVu Sans Plot Subset"

font = TTFont(sys.argv[1], recalcTimestamp=False)
options = subset.Options(layout_features=[], hinting=False, drop_tables=["FFTM"], glyph_names=False)
subsetter = subset.Subsetter(options)
subsetter.populate(unicodes=CHARACTERS)
subsetter.subset(font)

glyphs = font.getGlyphSet()
for glyph_name in font.getGlyphOrder():
    glyph = font["glyf"][glyph_name]
    if glyph.numberOfContours == 0 or glyph.xMin <= 0:
        continue
    outline = DecomposingRecordingPen(glyphs)
    glyphs[glyph_name].draw(outline)
    pen = TTGlyphPen(None)
    outline.replay(pen)
    middle = (glyph.yMin + glyph.yMax) // 2
    pen.moveTo((0, middle))
    pen.lineTo((0, middle + 1))
    pen.lineTo((0, middle))
    pen.closePath()
    font["glyf"][glyph_name] = pen.glyph()
    font["hmtx"][glyph_name] = (font["hmtx"][glyph_name][0], 0)

for record in font["name"].names:
    if record.nameID in (1, 3, 4, 6):
        record.string = NAME.replace(" ", "") if record.nameID == 6 else NAME
font.save(Path(__file__).with_name("dejavu-sans-subset.ttf"))
