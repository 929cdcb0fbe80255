"""Time second moments of five layers; see ``second_moments.py``, which this runs.

The standard library has a module of the same name. A script's folder comes first on the path, so an import of
``statistics`` while a benchmark runs finds this file, which then provides the standard library's module.
"""

import importlib
import sys

if __name__ == "__main__":
    from second_moments import main

    main()
else:
    sys.path.append(sys.path.pop(0))
    del sys.modules[__name__]
    sys.modules[__name__] = importlib.import_module(__name__)
