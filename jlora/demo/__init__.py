"""The embedded default: a small real model and three small real adapters."""

from jlora.demo.styles import DEMO_ADAPTERS as DEMO_ADAPTERS
