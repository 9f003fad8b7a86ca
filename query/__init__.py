"""Questions asked of a store: SQL, the contexts that make something fire, and nearest neighbours."""
