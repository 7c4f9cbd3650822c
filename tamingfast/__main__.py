import sys

from tamingfast.cli import main

sys.exit(main())
