"""Read run folders into one table, group the runs into conditions, and write the tables of a sweep."""

import pandas as pd

# Pandas 3 keeps texts in arrays of pyarrow, and so the names of columns. Our tables have few rows and hundreds of
# columns, and pandas takes a third longer with such arrays than with objects. The values are the same.
pd.set_option("mode.string_storage", "python")
