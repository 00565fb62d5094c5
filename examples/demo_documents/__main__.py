"""``python -m examples.demo_documents FOLDER`` draws the demo's documents into a folder."""

import argparse
from pathlib import Path

from examples.demo_documents import draw_demo_documents

parser = argparse.ArgumentParser(description="Draw the demo's documents.")
parser.add_argument("folder", type=Path)
folder = parser.parse_args().folder
folder.mkdir(parents=True, exist_ok=True)
for path in draw_demo_documents(folder):
    print(path)
