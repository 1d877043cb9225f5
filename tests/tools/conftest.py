import sys

from tests.conftest import REPOSITORY

# Scripts import each other from their folder, as Python has it when one is run.
sys.path.append(str(REPOSITORY / "tools"))
