"""The atlas: questions about the neurons of whole data sets, answered by DuckDB from runs. No torch."""
