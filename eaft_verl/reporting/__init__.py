"""What stands behind `eaft report`: statistics, comparability, tables and the page. Reads run directories only."""
