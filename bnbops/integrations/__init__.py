"""Other libraries on bnbops. Nothing here is imported by `import bnbops`: each module needs its library."""
