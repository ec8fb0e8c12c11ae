// Copyright 2026 The transformers-aurea authors. Licensed under the Apache License, Version 2.0.
// Stands in for the CUDA header of this name.
#include "emulation.h"
