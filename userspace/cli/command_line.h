// SPDX-License-Identifier: GPL-2.0-only OR MIT
// CLI11's names without its header, which takes longer to compile than most files that only hand a command on.
#pragma once

namespace CLI {
class App;
class Option;
} // namespace CLI
