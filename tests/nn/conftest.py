"""What the layers' tests share: no mesh, and simulated meshes of both kinds."""

from __future__ import annotations

import pytest

from lmx.core import sharding


@pytest.fixture(params=["none", "explicit", "auto"])
def mesh(request):
    with sharding.use_mesh(
        None if request.param == "none" else "fsdp=4,tensor=2", explicit=request.param == "explicit"
    ) as made:
        yield made
