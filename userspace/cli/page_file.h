// SPDX-License-Identifier: GPL-2.0-only OR MIT
// A file that appears whole or not at all: written under another name beside its place, then renamed. It is readable by
// its owner alone, and takes the place of a plain file only: root writes it, perhaps where others may write as well.
#pragma once

#include <string>

namespace finrace {

/// Throws UsageError or OutputError if `path` can't be written; leaves nothing behind.
void check_page_file(const std::string& path);

/// Throws the same; what was at `path` is then as it was.
void write_page_file(const std::string& path, const std::string& text);

} // namespace finrace
