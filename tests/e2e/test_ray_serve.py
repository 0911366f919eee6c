"""The application on real Ray: exact over each transport, bad requests do no harm, groups that die come back."""

import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import ray
import yaml
from ray import serve

from cluster.app import build
from cluster.local_ray import start_local_ray
from cluster.running_app import APPLICATION

pytestmark = pytest.mark.ray
GREEDY = {"model": "tiny", "temperature": 0, "ignore_eos": True, "seed": 1}
