"""`python -m gcvit_edge.targets.web`: fetches ONNX Runtime Web."""

import sys

from gcvit_edge.errors import UserError
from gcvit_edge.targets.web._runtime import fetch_runtime

try:
    print(f"fetched to {fetch_runtime()}")
except UserError as error:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(error.exit_code)
