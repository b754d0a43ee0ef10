"""HTTP requests."""

from miles.utils.http_utils import get as get
from miles.utils.http_utils import post as post
