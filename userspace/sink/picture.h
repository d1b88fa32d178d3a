// SPDX-License-Identifier: GPL-2.0-only OR MIT
// The page's two pictures, as SVG: the sequence diagram of a verdict's connection, and a pool's idle times. Colours are
// the page's (its style sheet), and none is the only one to tell what it tells. Each picture has a title and a
// description for those who don't see it.
#pragma once

#include <cstddef>
#include <string>
#include <string_view>
#include <vector>

#include "core/diagnosis.h"
#include "sink/markup.h"
#include "sink/story.h"

namespace finrace {

/// A sequence diagram, and where its steps are.
struct SequenceDiagram {
    Markup svg;
    double height = 0;      ///< in the picture's own unit, of which it is sequence_width wide
    std::vector<double> at; ///< of each of moments_of(), where this host saw it, from the top
};

constexpr int sequence_width = 300;

/// Time runs down, each arrow leaves and arrives: half a round trip apart, or as far as its sequence numbers demand.
/// `id` is unique on the page. Nothing is drawn (height 0) of a verdict without moments.
SequenceDiagram sequence_diagram(const Sighting& sighting, std::string_view id);

/// After how long a rest this host uses a pool's connections again and after how long the upstream closes them; where
/// the two meet, requests die. As wide as there is room for.
struct IdlePicture {
    Markup svg;
    std::string sentence; ///< what it shows
    bool may_go_on;       ///< no limit of this host's own has been seen
    bool some_die;        ///< some that were used again had rested until the upstream's close
};
IdlePicture idle_picture(const Pool& pool, std::string_view name, std::string_view id);

/// Whether there is anything to draw.
bool has_idle_times(const Pool& pool);

} // namespace finrace
