"""What tests of sources share: a memo of contents, and the reading of a whole source."""

import pytest

from pipeline.sources.content import ContentMemo
from pipeline.sources.files import pin_text
from pipeline.sources.text import documents, parts


@pytest.fixture
def memo(tmp_path):
    return ContentMemo(str(tmp_path / "memo"))


@pytest.fixture
def read(memo):
    """All documents of a source, part by part."""

    def read(source, unit="document", column="text"):
        files = pin_text(str(source), "data.source", memo)
        pieces = [part for file in files for part in parts(file)]
        return [text for part in pieces for text in documents(part, unit, column)]

    return read
