"""What several test files share.

Tiny corpora, tiny models, programs run in forks of the test process.
"""
import os

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
